"""Which padding-free form of a network pays, measured in the runtime that it will run in."""
