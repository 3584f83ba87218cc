"""`qwenvl serve --ray`: fronts and engines as replicas of Ray Serve."""
