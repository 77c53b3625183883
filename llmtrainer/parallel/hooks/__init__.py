"""Kinds of hooks: how gradients are changed on their way between processes."""
