"""What an attacker does with what it sees: inversion, a learned inverter, membership inference."""
