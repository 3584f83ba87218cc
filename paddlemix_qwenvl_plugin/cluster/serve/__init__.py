"""`qwenvl serve --ray`: fronts and engines as Ray Serve replicas."""
