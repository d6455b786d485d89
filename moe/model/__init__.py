"""ONE DEVICE: plain torch modules that know of no other rank."""
