"""Everyone else's formats: the authors' adapters, latent LoRAs, single files in the original layout."""
