"""Networks whose features the distances compare."""
