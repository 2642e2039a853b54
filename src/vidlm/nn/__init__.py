"""Shared network parts; they know no family and no engine.

Shapes are written with one legend throughout the package:

B requests        T packed tokens of a step    S memory tokens (keys, cached positions)
F frames          P patches per frame          M media tokens
D width           H query heads                K key/value heads        E head dimension
V vocabulary      N cache blocks
"""
