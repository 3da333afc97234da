"""`python -m cifake_ray`: the command, where its script is not on the path."""

from cifake_ray.cli import main

main()
