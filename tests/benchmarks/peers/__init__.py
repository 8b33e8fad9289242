"""How well other libraries from PyPI use a limit, each as its own documentation shows.

Each library is installed into a virtual environment of its own and run against the simulator there
(`trial`), in virtual time. `definitions` lists them, and the other modules show how each is used.
"""
