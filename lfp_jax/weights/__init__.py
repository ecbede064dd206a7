"""Foreign weight files and the native store: the only place that reads them."""
