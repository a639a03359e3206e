"""The online teacher: the fold's rule inside the training loop."""
