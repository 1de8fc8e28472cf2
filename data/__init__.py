"""A package, so that no other one called `data` on the path is imported in its place."""
