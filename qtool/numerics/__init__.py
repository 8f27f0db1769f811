"""Pure tensor functions: grids, scale search, packing. No modules, files or globals."""
