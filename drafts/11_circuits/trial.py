"""First trial of chapter 11: three features of the last layer, their trees, and the check of each; the root is chosen on the first half of a text, contexts that score come from the second. Not part of the course; begins with the cells of library.py in a module `circuits_x`."""
import time, torch
from circuits_x import *
from circuits_x import _value as _v
from codebook_tutorial.activations import harvest
from codebook_tutorial.core import data_path
from codebook_tutorial.formats import load_sae
from codebook_tutorial.models import load_lm, load_text
from codebook_tutorial.sae import refit, train_sae
from codebook_tutorial.stories import ID
import tempfile
torch.set_num_threads(1)
def T(name, fn): start = time.process_time(); out = fn(); print("##", name, round(time.process_time() - start, 1), flush=True); return out
m, tok = load_lm()
text = load_text(tok, n_tokens=120_000, length=256, split="train", seed=3)
with tempfile.TemporaryDirectory() as folder:
    store = harvest(m, text, ["resid.0", "resid.2"], folder + "/acts", verbose=False)
    D = {site: refit(train_sae(store.load(site), 384, "tied", alpha=.75, steps=800), store.load(site)) for site in ("resid.0", "resid.2")}
D = {"resid.0": D["resid.0"], "resid.1": load_sae(data_path("sae/tied")), "resid.2": D["resid.2"]}
nxt=text.ids.roll(-1,1); nxt[:,-1]=text.pad
half=len(text)//2
def study(model,D,site,truth,answer_ids,label,n_control=6):
    """root: feature of `site` with best F1 (above half of its max) for truth on first half"""
    f=feature_acts(model,site,D[site],text,range(len(D[site].directions)))
    a=f[:half]; strong=a>=.5*a.flatten(0,1).max(0).values
    strong&=a>0
    t=truth[:half]
    f1=2*(strong&t[...,None]).sum((0,1))/(strong.sum((0,1))+t.sum())
    j=int(f1.argmax()); b=f[half:,:,j]; s2=(b>=.5*a[...,j].max())
    print("==",label,site,j,"F1",round(f1[j].item(),3),"held out",round((2*(s2&truth[half:]).sum()/(s2.sum()+truth[half:].sum())).item(),3))
    return j,f[...,j]
def tree_check(model,D,root,f,answers,label):
    c=strong_contexts(text[:half],f[:half],20,where=answers[:half]); test=strong_contexts(text[half:],f[half:],30,where=answers[half:],seed=5)
    print(c,test)
    t=T("tree",lambda: causal_tree(model,D,root,c)); print(t)
    for ed in t.edges: print("   ",ed["child"],"->",ed["parent"],round(ed["effect"],2))
    rows=torch.arange(len(test))
    # what really came: next token at ends
    with torch.no_grad(): base=model(input_ids=test.ids).logits[rows,test.last].log_softmax(-1)
    tgt=base.argmax(-1)
    def p(edits):
        with torch.no_grad(), intervene(model,edits), capture(model,root[0]) as a: lp=model(input_ids=test.ids).logits[rows,test.last].log_softmax(-1)
        return round(lp.exp()[:,answer].mean().item(),3) if answer is not None else round(lp.gather(1,tgt[:,None]).exp().mean().item(),3), round(_v(D[root[0]],a[root[0]],root[1])[rows,test.last].mean().item(),2), round((base.exp()*(base-lp)).sum(-1).mean().item(),2)
    below=t.nodes[1:]
    print("clean",p({}),"below",p(ablate_nodes(D,below)),"all",p(ablate_nodes(D,t.nodes)), "root alone",p(ablate_nodes(D,[root])))
    r=[p(ablate_nodes(D,others_active(model,D,below,c,seed=s),like=below)) for s in range(6)]
    r2=[p(ablate_nodes(D,others_active(model,D,below,c,seed=s))) for s in range(6)]
    print("controls same length",r); print("controls as they are",r2)
names_next=nxt==ID[")"]
answer=ID[")"]
j,f=study(m,D,"resid.2",names_next,None,"close next")
tree_check(m,D,("resid.2",j),f,torch.ones_like(text.ids,dtype=torch.bool),"paren")
poss=nxt==ID["'s"]; answer=ID["'s"]
j,f=study(m,D,"resid.2",poss,None,"'s next")
tree_check(m,D,("resid.2",j),f,torch.ones_like(text.ids,dtype=torch.bool),"poss")
after=text.ids==ID["'s"]; answer=None
j,f=study(m,D,"resid.2",after,None,"at 's")
tree_check(m,D,("resid.2",j),f,torch.ones_like(text.ids,dtype=torch.bool),"at s")
