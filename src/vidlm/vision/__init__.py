"""Vision towers and the preprocessing of pixels for them."""
