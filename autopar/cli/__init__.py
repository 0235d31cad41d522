"""The command line. In: arguments. Out: results on stdout, progress and errors on stderr, a documented exit code.

Modules here import only click and light modules at the top; what a command needs (rich, msgspec, torch, a solver) is
imported when it runs, so that ``--help`` and usage errors are immediate.
"""
