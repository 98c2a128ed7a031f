"""What a message reveals: what the attacker sees and what was true, one view a method, residuals and history."""
