"""PROOF: a recipe's layouts train the same model as one process, shown on a model small enough to run anywhere."""
