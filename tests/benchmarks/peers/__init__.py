"""How well others use a limit: libraries from PyPI, each as its own documentation has it.

Each peer lives in a virtual environment of its own and meets the simulator there (`stage`), in
virtual time; `roster` says who they are, and the other modules how each is used.
"""
