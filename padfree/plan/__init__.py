"""Which matches belong together, tried until they verify."""
