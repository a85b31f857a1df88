"""Files: safetensors streamed from file to file, folders that appear whole or not at all."""
