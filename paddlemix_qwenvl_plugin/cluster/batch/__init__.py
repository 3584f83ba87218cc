"""`qwenvl batch --ray`: a batch job in parts, computed by a pool of Ray Data actors."""
