// From the chunks of a stream to pieces of text and the tokens that they are made of. Knows no page.
//
// A token: {token, probability, alternatives: [[text, probability], ...], weights: [K], leader}. Probability and
// alternatives are only there where the request has asked for them.

/** Collects the pieces of one answer: mostly one token each, several where only they make up a character. */
export class Pieces {
  #waiting = []; // tokens whose text has not come yet

  /** The pieces {text, tokens} that a chunk's choice brings. */
  add(choice) {
    const delta = choice.delta ?? {};
    const text = choice.text ?? (delta.reasoning_content ?? delta.reasoning ?? "") + (delta.content ?? "");
    const tokens = [...this.#waiting, ...tokensOf(choice)];
    if (text === "") {
      this.#waiting = tokens;
      return [];
    }
    this.#waiting = [];
    const each = tokens.map(({ token }) => token);
    if (tokens.length > 1 && each.every(Boolean) && each.join("") === text) {
      return tokens.map((token) => ({ text: token.token, tokens: [token] }));
    }
    return [{ text, tokens }];
  }
}

function tokensOf(choice) {
  const { weights = [], leaders = [] } = choice.decar ?? {};
  const said = saidOf(choice.logprobs);
  const count = Math.max(weights.length, said.length);
  return Array.from({ length: count }, (_, i) => ({ ...said[i], weights: weights[i], leader: leaders[i] }));
}

function saidOf(logprobs) {
  if (!logprobs) return [];
  if (logprobs.content) {
    return logprobs.content.map(({ token, logprob, top_logprobs: top }) => ({
      token,
      probability: Math.exp(logprob),
      alternatives: sorted((top ?? []).map((other) => [other.token, Math.exp(other.logprob)])),
    }));
  }
  return (logprobs.tokens ?? []).map((token, i) => ({
    token,
    probability: Math.exp(logprobs.token_logprobs[i]),
    alternatives: sorted(Object.entries(logprobs.top_logprobs?.[i] ?? {}).map(([t, l]) => [t, Math.exp(l)])),
  }));
}

const sorted = (pairs) => pairs.sort((one, other) => other[1] - one[1]);

/** The mean weights [K] of tokens that have some; null where none has. */
export function meanWeights(tokens) {
  const known = tokens.map(({ weights }) => weights).filter(Boolean);
  if (!known.length) return null;
  return known[0].map((_, k) => known.reduce((sum, weights) => sum + weights[k], 0) / known.length);
}

/** Neighbouring pieces of which the same expert has the largest weight: {expert, weight, text}. */
export function runs(pieces) {
  const found = [];
  for (const { text, tokens } of pieces) {
    const weights = meanWeights(tokens);
    if (!weights) continue;
    const expert = weights.indexOf(Math.max(...weights));
    const last = found.at(-1);
    if (last?.expert === expert) {
      last.text += text;
      last.weights.push(weights[expert]);
    } else found.push({ expert, text, weights: [weights[expert]] });
  }
  return found.map(({ expert, text, weights }) => ({
    expert,
    text,
    weight: weights.reduce((a, b) => a + b, 0) / weights.length,
  }));
}
