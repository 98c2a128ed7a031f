"""A map of threats: every defence under each of them, with the same attacker."""
