"""Captioned pictures that the project draws itself, and instruments that read them back.

Structure (shape, colour, position, background) and texture (kind, period) are drawn independently, so that for every
picture it is known what belongs to the low band and what to the high one. Read `pictures`, then `attributes`.
"""
