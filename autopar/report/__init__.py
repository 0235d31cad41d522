"""Plans for people and for other programs. In: a plan or a comparison. Out: text of a given width, JSON documents."""
