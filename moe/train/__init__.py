"""ONE RUN: the loop, its metrics, its evaluation, and what is kept in its folder."""
