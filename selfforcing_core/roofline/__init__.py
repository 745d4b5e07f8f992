"""Roofline: work in closed form, what a device can do, and what share of it a run reached."""
