//! From the packed rows of the projections to one tensor each.

use rayon::prelude::*;

use super::{Planted, Sizes, Stored};

/// `HK` groups of `[q K | k K | v (HV/HK) V | z (HV/HK) V]` to `[q HK K | k HK K | v HV V]` and `z`.
///
/// `qkv`: `[N, C]`; `z`: `[N, HV V]`; `qkvz`: `[N, C + HV V]`.
pub(super) fn ungroup_qkvz<E: Stored>(
    qkv: &mut [E],
    z: &mut [E],
    qkvz: &[E],
    Sizes { hk, hv, k, v }: Sizes,
    plant: Planted,
) {
    let (keys, values) = (hk * k, hv * v);
    let own = hv / hk * v;
    let rows = qkv.par_chunks_mut(2 * keys + values).zip(z.par_chunks_mut(values));
    rows.zip(qkvz.par_chunks(2 * (keys + values))).for_each(|((qkv, z), from)| {
        if plant.is("ungrouped-qkvz") {
            qkv.copy_from_slice(&from[..2 * keys + values]);
            z.copy_from_slice(&from[2 * keys + values..]);
            return;
        }
        let (q, rest) = qkv.split_at_mut(keys);
        let (key, value) = rest.split_at_mut(keys);
        let (value, z) = if plant.is("v-z-swapped") { (z, value) } else { (value, z) };
        for (j, group) in from.chunks(2 * k + 2 * own).enumerate() {
            q[j * k..][..k].copy_from_slice(&group[..k]);
            key[j * k..][..k].copy_from_slice(&group[k..2 * k]);
            value[j * own..][..own].copy_from_slice(&group[2 * k..][..own]);
            z[j * own..][..own].copy_from_slice(&group[2 * k + own..]);
        }
    });
}

/// `HK` groups of `[b HV/HK | a HV/HK]` to `b` and `a`.
///
/// `b`, `a`: `[N, HV]`; `ba`: `[N, 2 HV]`.
pub(super) fn ungroup_ba<E: Stored>(
    b: &mut [E],
    a: &mut [E],
    ba: &[E],
    Sizes { hk, hv, .. }: Sizes,
    plant: Planted,
) {
    let (b, a) = if plant.is("b-a-swapped") { (a, b) } else { (b, a) };
    let own = if plant.is("ungrouped-ba") { hv } else { hv / hk };
    let rows = b.chunks_mut(hv).zip(a.chunks_mut(hv)).zip(ba.chunks(2 * hv));
    for ((b, a), from) in rows {
        for ((b, a), group) in b.chunks_mut(own).zip(a.chunks_mut(own)).zip(from.chunks(2 * own)) {
            b.copy_from_slice(&group[..own]);
            a.copy_from_slice(&group[own..]);
        }
    }
}

/// The columns of a matrix, some `widths` at a time, as matrices of their own.
pub(super) fn split<E: Stored>(to: &mut [&mut Vec<E>], from: &[E], widths: &[usize]) {
    let whole: usize = widths.iter().sum();
    let mut start = 0;
    for (to, &width) in to.iter_mut().zip(widths) {
        let rows = to.par_chunks_mut(width).zip(from.par_chunks(whole));
        rows.for_each(|(to, from)| to.copy_from_slice(&from[start..start + width]));
        start += width;
    }
}
