"""The mathematics: lattice codes, packing, transforms, gains and rotary embeddings."""
