"""Hostile input: every parser of bytes that come from outside, driven by one table of targets.

`table.TARGETS` drives three things: `test_fuzz.py` in the ordinary suite (hypothesis, and a replay of `corpus/`), and
`python -m fuzz` (`make fuzz`), which runs each target under atheris, guided by coverage.
"""
