"""Holds a class that is registered as a transform and is none."""


class NotATransform:
    pass
