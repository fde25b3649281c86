//! virtio_net_hdr: cutting a TSO/USO superpacket into wire packets, one at a time and in place,
//! and joining received packets into superpackets for one write.

use crate::packet::{
    be16, be32, fix_ipv4_header, fold, pseudo_sum, put_sum, sum, transport, transport_sum_ok, TCP, UDP,
};

pub const VNET_LEN: usize = 10;
const F_NEEDS_CSUM: u8 = 1;
pub const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;
const MAX_HEADER: usize = 256;
const FIN: u8 = 1;
const PSH: u8 = 8;
const ACK: u8 = 16;
const CWR: u8 = 128;

/// struct virtio_net_hdr in host byte order.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VnetHdr {
    pub flags: u8,
    pub gso_type: u8,
    pub hdr_len: u16,
    pub gso_size: u16,
    pub csum_start: u16,
    pub csum_offset: u16,
}

impl VnetHdr {
    /// A packet of its own, no superpacket.
    pub fn is_single(&self) -> bool {
        self.gso_type & !GSO_ECN == GSO_NONE
    }

    pub fn read(b: &[u8]) -> Self {
        let f = |at: usize| u16::from_ne_bytes([b[at], b[at + 1]]);
        Self {
            flags: b[0],
            gso_type: b[1],
            hdr_len: f(2),
            gso_size: f(4),
            csum_start: f(6),
            csum_offset: f(8),
        }
    }

    pub fn bytes(&self) -> [u8; VNET_LEN] {
        let mut b = [self.flags, self.gso_type, 0, 0, 0, 0, 0, 0, 0, 0];
        b[2..4].copy_from_slice(&self.hdr_len.to_ne_bytes());
        b[4..6].copy_from_slice(&self.gso_size.to_ne_bytes());
        b[6..8].copy_from_slice(&self.csum_start.to_ne_bytes());
        b[8..10].copy_from_slice(&self.csum_offset.to_ne_bytes());
        b
    }
}

/// A superpacket being cut. Call [`Segmenter::prepare`] for 0, 1, .. in order.
pub struct Segmenter {
    header: [u8; MAX_HEADER],
    header_len: usize,
    l4: usize,
    csum_at: usize,
    proto: u8,
    v6: bool,
    gso_size: usize,
    total: usize,
    pseudo: u64,
    pub count: usize,
}

/// Completes the checksum the kernel left to the device.
fn complete_checksum(h: &VnetHdr, pkt: &mut [u8]) -> Option<()> {
    let start = usize::from(h.csum_start);
    let at = start + usize::from(h.csum_offset);
    if at + 2 > pkt.len() {
        return None;
    }
    let mut s = !fold(sum(&pkt[start..]));
    if s == 0 {
        s = 0xffff;
    }
    put_sum(pkt, at, s);
    Some(())
}

/// Classifies a packet read from the TUN; `None` when its header contradicts it.
pub fn outbound(h: &VnetHdr, pkt: &mut [u8], slot: &mut Segmenter) -> Option<bool> {
    if h.is_single() {
        if h.flags & F_NEEDS_CSUM != 0 {
            complete_checksum(h, pkt)?;
        }
        return Some(false);
    }
    slot.start(h, pkt)?;
    Some(true)
}

impl Default for Segmenter {
    fn default() -> Self {
        Self {
            header: [0; MAX_HEADER],
            header_len: 0,
            l4: 0,
            csum_at: 0,
            proto: 0,
            v6: false,
            gso_size: 0,
            total: 0,
            pseudo: 0,
            count: 0,
        }
    }
}

impl Segmenter {
    fn start(&mut self, h: &VnetHdr, pkt: &[u8]) -> Option<()> {
        let v6 = pkt.first()? >> 4 == 6;
        let proto = match h.gso_type & !GSO_ECN {
            GSO_TCPV4 if !v6 => TCP,
            GSO_TCPV6 if v6 => TCP,
            GSO_UDP_L4 => UDP,
            _ => return None,
        };
        let l4 = usize::from(h.csum_start);
        let min_ip = if v6 { 40 } else { 20 };
        // The header length in the virtio header is a hint: trust only the packet.
        let header_len = if proto == TCP { l4 + usize::from(pkt.get(l4 + 12)? >> 4) * 4 } else { l4 + 8 };
        let min_l4 = if proto == TCP { 20 } else { 8 };
        if !v6 && !(20..=l4).contains(&(usize::from(pkt[0] & 15) * 4)) {
            return None;
        }
        if l4 < min_ip || header_len < l4 + min_l4 || header_len > MAX_HEADER || header_len >= pkt.len() {
            return None;
        }
        if h.gso_size == 0 || h.flags & F_NEEDS_CSUM == 0 {
            return None;
        }
        self.header[..header_len].copy_from_slice(&pkt[..header_len]);
        self.header_len = header_len;
        self.l4 = l4;
        self.csum_at = l4 + if proto == TCP { 16 } else { 6 };
        self.header[self.csum_at..self.csum_at + 2].fill(0);
        self.proto = proto;
        self.v6 = v6;
        self.gso_size = usize::from(h.gso_size);
        self.total = pkt.len();
        self.pseudo = pseudo_sum(pkt, v6, proto, 0);
        self.count = (pkt.len() - header_len).div_ceil(self.gso_size);
        Some(())
    }

    /// Length of segment `i`, headers included.
    pub fn len(&self, i: usize) -> usize {
        let start = self.header_len + i * self.gso_size;
        self.header_len + (self.total - start).min(self.gso_size)
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Writes the headers of segment `i` right before its payload, over bytes of segment `i - 1`,
    /// and returns where the segment starts. Its length is [`Segmenter::len`].
    pub fn prepare(&self, i: usize, pkt: &mut [u8]) -> usize {
        let start = i * self.gso_size;
        let len = self.len(i);
        let b = &mut pkt[start..start + len];
        b[..self.header_len].copy_from_slice(&self.header[..self.header_len]);
        if self.v6 {
            b[4..6].copy_from_slice(&((len - 40) as u16).to_be_bytes());
        } else {
            b[2..4].copy_from_slice(&(len as u16).to_be_bytes());
            let id = be16(b, 4).wrapping_add(i as u16);
            b[4..6].copy_from_slice(&id.to_be_bytes());
            fix_ipv4_header(b);
        }
        let l4_len = len - self.l4;
        if self.proto == TCP {
            let seq = be32(b, self.l4 + 4).wrapping_add((i * self.gso_size) as u32);
            b[self.l4 + 4..self.l4 + 8].copy_from_slice(&seq.to_be_bytes());
            if i + 1 < self.count {
                b[self.l4 + 13] &= !(FIN | PSH);
            }
            if i > 0 {
                b[self.l4 + 13] &= !CWR;
            }
        } else {
            b[self.l4 + 4..self.l4 + 6].copy_from_slice(&(l4_len as u16).to_be_bytes());
        }
        let length_sum = u64::from(u32::from_ne_bytes((l4_len as u32).to_be_bytes()));
        let mut s = !fold(self.pseudo + length_sum + sum(&b[self.l4..]));
        if s == 0 && self.proto == UDP {
            s = 0xffff;
        }
        put_sum(b, self.csum_at, s);
        start
    }
}

/// A piece of a receive buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    pub buf: usize,
    pub off: usize,
    pub len: usize,
}

/// Receive buffers the spans point into.
pub trait Buffers {
    fn bytes(&self, s: Span) -> &[u8];
    fn bytes_mut(&mut self, s: Span) -> &mut [u8];
}

#[derive(Clone, Copy, PartialEq, Eq, Default)]
struct Flow {
    addresses: [u128; 2],
    ports: u32,
    proto: u8,
    v6: bool,
}

/// Packets that leave in one write: a whole first packet, then payloads.
#[derive(Default)]
pub struct Group {
    pub vnet: VnetHdr,
    pub spans: Vec<Span>,
    flow: Flow,
    open: bool,
    header_len: usize,
    ip_len: usize,
    mss: usize,
    next_seq: u32,
    total: usize,
    psh: bool,
}

/// Joins packets per flow; emission order keeps every flow's own order.
pub struct Coalescer {
    groups: Vec<Group>,
    used: usize,
    tcp: bool,
    udp: bool,
}

const MAX_PARTS: usize = 128;
const MAX_TOTAL: usize = 65_535;
/// How many recent groups are searched for a packet's flow.
const SEARCH: usize = 16;

impl Coalescer {
    /// `tcp`, `udp`: whether the TUN takes such superpackets.
    pub fn new(tcp: bool, udp: bool) -> Self {
        Self { groups: Vec::new(), used: 0, tcp, udp }
    }

    pub fn groups(&self) -> &[Group] {
        &self.groups[..self.used]
    }

    pub fn clear(&mut self) {
        self.used = 0;
    }

    /// Stops joining (the kernel refused a superpacket).
    pub fn disable(&mut self) {
        self.tcp = false;
        self.udp = false;
    }

    fn fresh(&mut self, span: Span) -> &mut Group {
        if self.used == self.groups.len() {
            self.groups.push(Group::default());
        }
        let g = &mut self.groups[self.used];
        self.used += 1;
        g.vnet = VnetHdr::default();
        g.spans.clear();
        g.spans.push(span);
        g.open = false;
        g.flow = Flow::default();
        g
    }

    /// Adds one valid packet (exactly its own bytes, no padding).
    pub fn push<B: Buffers>(&mut self, bufs: &B, span: Span) {
        let b = bufs.bytes(span);
        let Some(t) = transport(b) else {
            self.fresh(span);
            return;
        };
        let joinable = if t.proto == TCP { self.tcp } else { self.udp };
        let payload = span.len - t.header_len;
        let flags = if t.proto == TCP { b[t.ip_len + 13] } else { ACK };
        let address = |at: usize| u128::from_ne_bytes(b[at..at + 16].try_into().expect("16 bytes"));
        let flow = Flow {
            addresses: if t.v6 {
                [address(8), address(24)]
            } else {
                [u128::from(be32(b, 12)), u128::from(be32(b, 16))]
            },
            ports: be32(b, t.ip_len),
            proto: t.proto,
            v6: t.v6,
        };
        let plain = joinable
            && payload > 0
            && flags & !PSH == ACK
            && (t.proto == TCP || usize::from(be16(b, t.ip_len + 4)) == span.len - t.ip_len)
            && transport_sum_ok(b, &t);
        let seq = if t.proto == TCP { be32(b, t.ip_len + 4) } else { 0 };
        let low = self.used.saturating_sub(SEARCH);
        if let Some(g) = self.groups[low..self.used].iter_mut().rev().find(|g| g.flow == flow) {
            if plain && g.open && g.takes(bufs, b, &t, payload, seq) {
                g.spans.push(Span { buf: span.buf, off: span.off + t.header_len, len: payload });
                g.total += payload;
                g.next_seq = g.next_seq.wrapping_add(payload as u32);
                g.psh |= flags & PSH != 0;
                g.open = payload == g.mss && !g.psh && g.spans.len() < MAX_PARTS;
                return;
            }
            g.open = false;
        }
        let g = self.fresh(span);
        g.flow = flow;
        g.open = plain && flags & PSH == 0;
        g.psh = flags & PSH != 0;
        g.header_len = t.header_len;
        g.ip_len = t.ip_len;
        g.mss = payload;
        g.next_seq = seq.wrapping_add(payload as u32);
        g.total = span.len;
    }

    /// Rewrites the first packet of every joined group into a superpacket's header.
    pub fn finish<B: Buffers>(&mut self, bufs: &mut B) {
        for g in &mut self.groups[..self.used] {
            if g.spans.len() < 2 {
                continue;
            }
            let (v6, proto) = (g.flow.v6, g.flow.proto);
            let b = bufs.bytes_mut(g.spans[0]);
            let l4_len = g.total - g.ip_len;
            if v6 {
                b[4..6].copy_from_slice(&((g.total - 40) as u16).to_be_bytes());
            } else {
                b[2..4].copy_from_slice(&(g.total as u16).to_be_bytes());
                fix_ipv4_header(b);
            }
            let csum_offset = if proto == TCP { 16 } else { 6 };
            if proto == TCP {
                if g.psh {
                    b[g.ip_len + 13] |= PSH;
                }
            } else {
                b[g.ip_len + 4..g.ip_len + 6].copy_from_slice(&(l4_len as u16).to_be_bytes());
            }
            let s = fold(pseudo_sum(b, v6, proto, l4_len));
            put_sum(b, g.ip_len + csum_offset, s);
            g.vnet = VnetHdr {
                flags: F_NEEDS_CSUM,
                gso_type: match (proto, v6) {
                    (TCP, false) => GSO_TCPV4,
                    (TCP, true) => GSO_TCPV6,
                    _ => GSO_UDP_L4,
                },
                hdr_len: g.header_len as u16,
                gso_size: g.mss as u16,
                csum_start: g.ip_len as u16,
                csum_offset: csum_offset as u16,
            };
        }
    }
}

impl Group {
    /// Several UDP datagrams in one write: their reader's buffer has room for few of these.
    pub fn is_datagrams(&self) -> bool {
        self.vnet.gso_type == GSO_UDP_L4
    }

    fn takes<B: Buffers>(
        &self,
        bufs: &B,
        b: &[u8],
        t: &crate::packet::Transport,
        payload: usize,
        seq: u32,
    ) -> bool {
        if t.header_len != self.header_len || payload > self.mss || self.total + payload > MAX_TOTAL {
            return false;
        }
        let head = bufs.bytes(self.spans[0]);
        let ip_same = if t.v6 {
            // Version, class, label; hop limit.
            head[..4] == b[..4] && head[7] == b[7]
        } else {
            let in_order = be16(head, 4).wrapping_add(self.spans.len() as u16) == be16(b, 4);
            head[1] == b[1] && head[6] == b[6] && head[8] == b[8] && (head[6] & 0x40 != 0 || in_order)
        };
        if !ip_same {
            return false;
        }
        if t.proto == UDP {
            return true;
        }
        let l4 = t.ip_len;
        // Acknowledgement; window; options.
        seq == self.next_seq
            && head[l4 + 8..l4 + 12] == b[l4 + 8..l4 + 12]
            && head[l4 + 14..l4 + 16] == b[l4 + 14..l4 + 16]
            && head[l4 + 18..t.header_len] == b[l4 + 18..t.header_len]
    }
}
