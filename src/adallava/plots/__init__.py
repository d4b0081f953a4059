"""Figures and reports, drawn from plain data so that they need no model."""
