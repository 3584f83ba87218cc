"""`qwenvl batch --ray`: a batch job in parts, on a pool of Ray Data's actors."""
