// Choosing a token. Temperature 0: the largest logit, ties to the lowest id. Otherwise of
// softmax(logits / temperature), most probable first: the first top_k (0: all), of these the shortest
// prefix that reaches top_p of them, of this the first token whose cumulated share exceeds uniform.
//
// sampling_naive: one block per row. It walks the tokens in order again and again, and sorts nothing.

#include "common/order.cuh"

enum Plant {
    HONEST,
    TEMPERATURE_MULTIPLIED,
    TOP_K_ONE_MORE,
    TOP_P_ONE_LESS,
    TOP_P_ONE_MORE,
    NOT_RENORMALISED,
};

extern "C" __global__ void sampling_naive(
    long long* __restrict__ ids,        // [N]
    const E* __restrict__ logits,       // [N, M]
    const float* __restrict__ uniform,  // [N]
    float temperature,
    int top_k,
    float top_p,
    int M,
    int plant)
{
    const E* row = logits + (size_t)blockIdx.x * M;
    const Place first = next(row, M, start());
    const float heat = plant == TEMPERATURE_MULTIPLIED ? 1 / temperature : temperature;
    int kept = top_k == 0 ? M : min(top_k + (plant == TOP_K_ONE_MORE), M);
    if (temperature == 0) kept = 0;

    float total = 0;
    Place place = first;
    for (int i = 0; i < kept; i++, place = next(row, M, place)) total += expf((place.x - first.x) / heat);

    if (top_p < 1) {
        const float enough = top_p * total;
        float sum = 0, before = 0;
        int cut = 0;
        for (place = first; cut < kept && (cut == 0 || sum < enough); place = next(row, M, place), cut++) {
            before = sum;
            sum += expf((place.x - first.x) / heat);
        }
        if (plant == TOP_P_ONE_LESS && 1 < cut) cut -= 1, sum = before;
        if (plant == TOP_P_ONE_MORE && cut < kept) cut += 1, sum += expf((place.x - first.x) / heat);
        kept = cut;
        if (plant != NOT_RENORMALISED) total = sum;
    }

    const float aim = uniform[blockIdx.x] * total;
    float sum = expf(0);
    place = first;
    for (int i = 1; i < kept && sum <= aim; i++) {
        place = next(row, M, place);
        sum += expf((place.x - first.x) / heat);
    }
    if (threadIdx.x == 0) ids[blockIdx.x] = place.id;
}
