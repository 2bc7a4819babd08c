"""An inspection program that is sold sealed: it, its labels and its model travel in one package."""
