"""What the interpreter raises."""


class Fault(AssertionError):
    """A program did what a GPU need not survive, or what the interpreter does not understand."""
