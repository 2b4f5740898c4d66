"""From which layers of a teacher network should a student take hints?

Modules are flat and imported by name, for example ``from pursuhint_lib.similarity import linear_cka``.
Nothing is imported here, so that a light command (a parameter check, `make reproduce` with nothing to do) stays light.
"""
