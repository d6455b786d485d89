"""PLACES: where things live and how they travel. With `engines` and `checkpoint` the only floors that communicate."""
