"""One file a study: `get_config(arg)` and, where there is a grid, `sweep(add)`."""
