"""What the research code does before it loads a model."""


def disable_torch_init() -> None:
    """Nothing: no weight is initialised before it is loaded here."""
