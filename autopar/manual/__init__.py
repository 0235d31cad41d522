"""Layouts written by hand. In: a layout's text and a traced model. Out: the plan it means, priced by the tables of the search;
the best of a grid of layouts beside a plan."""
