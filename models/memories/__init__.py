"""Product-key memories, the layer and its parts, and the architectures that carry one: pkm, memory_plus, msn, lmn."""
