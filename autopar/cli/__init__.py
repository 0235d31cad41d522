"""The command line. In: arguments. Out: results on stdout, progress and errors on stderr, a documented exit code.

Modules here import only click at the top; what a command needs (rich, msgspec, torch, a solver) loads when it runs.
"""
