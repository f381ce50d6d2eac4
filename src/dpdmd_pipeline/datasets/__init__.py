"""File formats the catalog needs and Kedro lacks."""
