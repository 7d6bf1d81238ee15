"""Targets are where a bundle is measured. Each is a module with the verb `measure`; none imports another."""
