"""Transfer evaluations: a model's features, or its classes, on other datasets."""
