"""Fitting a lift: streaming second moments of (latent, pixel) token pairs, and what can be read from them."""
