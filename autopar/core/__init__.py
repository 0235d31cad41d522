"""The nouns everything above speaks in: meshes and placements, manual layouts, plans and their files, errors.

In: nothing of autopar. Out: frozen types, their texts and the checks between their parts; no torch and no solver.
"""
