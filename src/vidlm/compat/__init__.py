"""Names of other code bases, for scripts written against them."""
