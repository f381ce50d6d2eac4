"""Exports of a student as files of other programs, and pictures drawn from any of them."""
