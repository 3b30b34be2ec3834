-- The features that someone labelled, noted something of or starred, with what they fire on and promote.
-- needs labels features
SELECT feature, starred, label, note, top_token, frequency, max, author, updated
FROM labels
JOIN features USING (feature)
ORDER BY starred DESC, feature
