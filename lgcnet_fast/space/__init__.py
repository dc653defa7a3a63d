"""Search spaces: genotypes, the interface of a space, LGCNet and GAS, and their networks."""
